"""What a step costs: the loop around it, the adapter in it, the real size; and what an audit costs."""
