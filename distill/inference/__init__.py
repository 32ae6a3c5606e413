"""What is done with a trained network: it is found, predicts, and is measured."""
