"""The algebra: solver steps, distillation objectives, samplers and the teacher."""
