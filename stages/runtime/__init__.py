"""What stages share: artifacts, checkpoints, engine, loop, schedule, metrics, tracking. Imports no stage."""
