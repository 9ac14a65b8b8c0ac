"""Measurements of deptjax beside torch and HF peft. README.md says what is measured and how."""
