"""What is compared: fastcnn and its rivals on one network, and whether they compute the same."""
