import runpy

runpy.run_module("job.train", run_name="__main__", alter_sys=True)
