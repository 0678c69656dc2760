"""What is layered on top of exact attention, one family a file."""
