"""What is measured: accuracies, draws and factors."""
