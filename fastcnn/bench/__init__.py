"""`fastcnn bench`: training steps of networks under several backends, compared in one run."""
