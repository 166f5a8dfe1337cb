"""What a process needs around the work: device, signals, hangs, storage, logs, the launcher."""
