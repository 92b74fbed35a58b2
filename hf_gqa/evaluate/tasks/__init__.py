"""Questions with right answers: recall from the context, and the tasks of lm_eval."""
