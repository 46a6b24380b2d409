"""What a master can ask of an agent: one contract, two transports."""
