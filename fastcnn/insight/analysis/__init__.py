"""What a trained network does: metrics by class, calibration, Grad-CAM, feature maps."""
