"""From the Gramian of many losses' gradients to the weights of one update."""
