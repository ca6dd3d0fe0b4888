"""Training an adapter on a frozen base: the plan, the loop, the step, and what is saved."""
