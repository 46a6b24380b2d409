"""All that touches the host and can be replaced in tests: clock, processes, files, certificates, secrets, configuration."""
