"""What the scripts must agree on, so that their numbers can be compared. Nothing here parses a flag or prints a result."""
