"""Where arrays live: the device mesh, the rules from logical to mesh axes, and multi-host start-up."""
