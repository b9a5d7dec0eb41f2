"""The pipeline `narvl run`: data, teacher, distillation, student, calibration, generation, latency, report.

Its stages are programs. A stage is skipped if its output exists. See `narvl_plugin.pipeline.run`.
"""
