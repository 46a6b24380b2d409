"""What the control plane costs, measured on real daemons in a lab: ``make bench``. See docs/reference/benchmarks.md."""
