"""What a model does on samples: its linear readers of channels, their moments, and two graphs run side by side."""
