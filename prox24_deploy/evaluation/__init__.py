"""Every figure of accuracy: language, classes, embeddings, speech, engines, tasks of lm-eval."""
