"""Several processes: the world, DDP and FSDP2, heartbeats."""
