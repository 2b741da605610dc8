"""The student's weights on their way from the learner to the actors."""
