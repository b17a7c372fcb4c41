"""What a budget leaves open is chosen, the batch is held to the plan, and the plan is compared with the step."""
