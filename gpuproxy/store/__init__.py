"""The one door to the database: schema, engine, migrations."""
