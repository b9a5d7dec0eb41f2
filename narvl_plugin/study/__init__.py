"""The study `narvl study`: many runs whose settings are crossed, and the table that compares them.

`plan` reads the study's file, `cells` names the runs, `running` starts those that are not done, `measures` reads what
they have measured, and `report` compares them.
"""
