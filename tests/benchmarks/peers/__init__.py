"""What runs inside the processes that are compared, each with its own Python and library."""
