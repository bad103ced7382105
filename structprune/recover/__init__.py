"""What comes between verification and export: calibration, compensation, fine-tuning. Nothing yet.

A step here takes a verified `Result` and calibration data, and returns a module of the same shapes with other values: verification by
masks speaks of the weights before it.
"""
