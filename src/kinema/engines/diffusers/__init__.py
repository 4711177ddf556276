"""Any video pipeline of the library diffusers as an engine: its loop is run step by step, so videos take turns."""
