"""The Sparse Deep Neural Network Graph Challenge: its networks, files, inputs, and oracle."""
