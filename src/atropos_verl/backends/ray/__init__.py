"""verl's V1 trainer on Ray with rollouts from Atropos environments: the cluster backend."""
