"""The first process of a lab node: makes the node's own root, then keeps its services running and reaps orphans. Standard library only."""
