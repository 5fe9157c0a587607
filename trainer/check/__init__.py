"""What is wrong with a run before a GPU is spent: rules on facts, and the report of them."""
