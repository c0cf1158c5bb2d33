"""Floor 2: rules that move router biases, and health figures of the routing."""
