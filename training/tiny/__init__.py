"""How the bundled tiny Wan checkpoint is made: a rendered world, its language, two trainings, an export, a judge."""
