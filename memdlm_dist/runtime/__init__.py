"""Process environment of a run: device, signals, hang detection, storage, logs and the launcher."""
