"""Plan a run from a machine without accelerators: compile the real step for the real topology, and price it."""
