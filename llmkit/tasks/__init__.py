"""Tasks: questions with right answers, the scores of models on them, and how sure the scores are."""
