"""Durable work (PROTOCOLS 2): a request becomes a job with its locks; its steps are journaled; every job ends."""
