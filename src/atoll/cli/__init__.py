"""The command line. It starts in under 200 ms, so nothing here imports server libraries; modules load when they are used."""
