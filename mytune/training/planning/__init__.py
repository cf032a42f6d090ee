"""What a run will take before it is run: a simulated step, the memory of each part, a page."""
