"""The algebra: noise schedules, distillation objectives, samplers and the teacher."""
