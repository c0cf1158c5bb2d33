"""Floor 2: recipes are Python functions that return a whole RunConfig. `table.py` names them."""
