"""What can be asked for, one module per noun. Each operation is a sequence of journaled steps."""
