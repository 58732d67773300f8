"""The planner's subjects: endpoints, the context of a request, and questions that are answered beside the loop."""
