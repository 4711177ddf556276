"""The process that owns a device: tasks in, events out."""
