"""What exists: objects, ids, units, errors, wire messages. No I/O and no clock here."""
