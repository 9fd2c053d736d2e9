"""Defects of stores, each with the tests of `StoreTests` that must find it."""

from __future__ import annotations

# Each defect: the tests that must find it, and what is wrong in a store that is otherwise LocalStore.
FILES: dict[str, tuple[str, str]] = {
    "create opens what is there": (
        "a_file_that_is_there_is_not_created_again a_link_that_leads_nowhere_is_not_followed",
        """
        def create(self, path, size):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644); self._buffered.add(descriptor)
            return descriptor""",
    ),
    "create looks first": (
        "of_many_that_create_one_file_one_succeeds a_link_that_leads_nowhere_is_not_followed",
        """
        def create(self, path, size):
            if os.path.exists(path): raise FileExistsError(errno.EEXIST, 'there', path)
            time.sleep(0.01)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644); self._buffered.add(descriptor)
            return descriptor""",
    ),
    "create does not name the path": (
        "a_file_that_is_there_is_not_created_again a_file_is_not_created_where_there_is_no_directory",
        """
        def create(self, path, size):
            try: return super().create(path, size)
            except OSError as e: raise OSError(e.errno, e.strerror) from None""",
    ),
    "create makes directories": (
        "a_file_is_not_created_where_there_is_no_directory",
        """
        def create(self, path, size):
            os.makedirs(os.path.dirname(path), exist_ok=True); return super().create(path, size)""",
    ),
    "create reserves nothing": (
        "space_is_reserved that_there_is_no_space_is_known_at_once",
        "def create(self, path, size): return super().create(path, 0)",
    ),
    "create reserves by a hole": (
        "space_is_reserved that_there_is_no_space_is_known_at_once",
        """
        def create(self, path, size):
            descriptor = super().create(path, 0); os.ftruncate(descriptor, size); return descriptor""",
    ),
    "create keeps it open where there is no space": (
        "that_there_is_no_space_is_known_at_once",
        """
        def create(self, path, size):
            descriptor = super().create(path, 0)
            try: os.posix_fallocate(descriptor, 0, max(size, 1))
            except OSError as e: e.filename = path; raise
            return descriptor""",
    ),
    "write forgets the offset": (
        "bytes_arrive_at_their_offsets[aligned-backwards] read_only_memory_and_none_at_all threads_write_to_one_file",
        "def write(self, descriptor, data, offset): self._leave_direct(descriptor); os.write(descriptor, data)",
    ),
    "write goes by a position that threads share": (
        "threads_write_to_one_file",
        """
        def write(self, descriptor, data, offset):
            self._leave_direct(descriptor); os.lseek(descriptor, offset, 0); time.sleep(0.001)
            os.write(descriptor, data)""",
    ),
    "write takes aligned memory alone": (
        "bytes_arrive_at_their_offsets[unaligned-at once]",
        "def write(self, descriptor, data, offset): os.pwrite(descriptor, data, offset)",
    ),
    "write rounds the offset": (
        "bytes_arrive_at_their_offsets[aligned-odd offset] bytes_arrive_at_their_offsets[aligned-over each other]",
        "def write(self, descriptor, data, offset): super().write(descriptor, data, offset // 4096 * 4096)",
    ),
    "write rounds the length": (
        "threads_write_to_one_file",
        """
        def write(self, descriptor, data, offset):
            super().write(descriptor, data[:len(data) // 4096 * 4096] if len(data) > 4096 else data, offset)""",
    ),
    "write pads what is short": (
        "bytes_arrive_at_their_offsets[aligned-over each other]",
        """
        def write(self, descriptor, data, offset):
            super().write(descriptor, memoryview(bytes(data) + bytes(-len(data) % 4096)), offset)""",
    ),
    "write stays within what was reserved": (
        "more_than_was_reserved",
        """
        def create(self, path, size): self.size = size; return super().create(path, size)
        def write(self, descriptor, data, offset):
            super().write(descriptor, data[:self.size - offset] if self.size else data, offset)""",
    ),
    "write keeps the buffer": (
        "the_buffer_is_the_callers_again",
        """
        kept = ()
        def write(self, descriptor, data, offset): self.kept = [*self.kept, (data, offset)]
        def finish(self, descriptor, size):
            for data, offset in self.kept: super().write(descriptor, data, offset)
            super().finish(descriptor, size)""",
    ),
    "write needs memory it may change": (
        "read_only_memory_and_none_at_all",
        """
        def write(self, descriptor, data, offset):
            assert data and not data.readonly; super().write(descriptor, data, offset)""",
    ),
    "write does not look at how much was written": (
        "a_write_of_which_only_a_part_arrives_fails[aligned] a_write_of_which_only_a_part_arrives_fails[unaligned]",
        """
        def write(self, descriptor, data, offset):
            self._leave_direct(descriptor); os.pwrite(descriptor, data, offset)""",
    ),
    "write swallows a full disk": (
        "a_disk_that_fills_up_fails_the_write",
        """
        def write(self, descriptor, data, offset):
            try: super().write(descriptor, data, offset)
            except OSError as e:
                if e.errno != errno.ENOSPC: raise""",
    ),
    "write does not name the path": (
        "a_write_of_which_only_a_part_arrives_fails[aligned] a_disk_that_fills_up_fails_the_write",
        """
        def write(self, descriptor, data, offset):
            try: super().write(descriptor, data, offset)
            except OSError as e: raise OSError(e.errno, e.strerror) from None""",
    ),
    "one file at a time": (
        "several_files_are_open",
        """
        def create(self, path, size): self.one = super().create(path, size); return self.one
        def write(self, descriptor, data, offset): super().write(self.one, data, offset)""",
    ),
    "one descriptor for all threads": (
        "threads_write_to_files_of_their_own",
        """
        def create(self, path, size): self.one = super().create(path, size); time.sleep(0.002); return self.one""",
    ),
    "finish does not cut": (
        "a_finished_file_has_its_size[1] a_finished_file_has_its_size[0] a_finished_file_has_its_size[262143]",
        """
        def finish(self, descriptor, size):
            os.fchmod(descriptor, 0o444); os.fsync(descriptor); self.abandon(descriptor)""",
    ),
    "finish cuts to whole blocks": (
        "a_finished_file_has_its_size[1] a_finished_file_has_its_size[262143] a_file_holds_what_was_written",
        "def finish(self, descriptor, size): super().finish(descriptor, -(-size // 4096) * 4096)",
    ),
    "finish does not lengthen": (
        "a_finished_file_has_its_size[262149]",
        "def finish(self, descriptor, size): super().finish(descriptor, min(size, os.fstat(descriptor).st_size))",
    ),
    "finish takes 0 for unknown": (
        "a_finished_file_has_its_size[0]",
        "def finish(self, descriptor, size): super().finish(descriptor, size or os.fstat(descriptor).st_size)",
    ),
    "finish leaves it writable": (
        "a_finished_file_is_read_only",
        """
        def finish(self, descriptor, size):
            os.ftruncate(descriptor, size); os.fsync(descriptor); self.abandon(descriptor)""",
    ),
    "finish leaves it open": (
        "an_empty_file a_file_holds_what_was_written",
        """
        def finish(self, descriptor, size):
            os.ftruncate(descriptor, size); os.fchmod(descriptor, 0o444); os.fsync(descriptor)""",
    ),
    "finish leaves it open where it fails": (
        "a_finish_that_fails_says_so_and_closes",
        """
        def finish(self, descriptor, size):
            with self._naming(descriptor):
                os.ftruncate(descriptor, size); os.fchmod(descriptor, 0o444); os.fsync(descriptor)
            self.abandon(descriptor)""",
    ),
    "finish fails silently": (
        "a_finish_that_fails_says_so_and_closes a_sync_that_fails_is_an_error_and_not_tried_again",
        """
        def finish(self, descriptor, size):
            try: super().finish(descriptor, size)
            except OSError: pass""",
    ),
    "finish does not sync": (
        "a_finished_file_was_synced_with_its_last_size what_is_durable_outlives_a_power_cut",
        """
        def finish(self, descriptor, size):
            os.ftruncate(descriptor, size); os.fchmod(descriptor, 0o444); self.abandon(descriptor)
        def sync_directory(self, path): pass""",
    ),
    "finish syncs before it cuts": (
        "a_finished_file_was_synced_with_its_last_size",
        """
        def finish(self, descriptor, size):
            os.fchmod(descriptor, 0o444); os.fsync(descriptor); os.ftruncate(descriptor, size)
            self.abandon(descriptor)""",
    ),
    "finish syncs before it makes read-only": (
        "a_finished_file_was_synced_with_its_last_size",
        """
        def finish(self, descriptor, size):
            os.ftruncate(descriptor, size); os.fsync(descriptor); os.fchmod(descriptor, 0o444)
            self.abandon(descriptor)""",
    ),
    "finish tries a failed sync again": (
        "a_sync_that_fails_is_an_error_and_not_tried_again",
        """
        def finish(self, descriptor, size):
            os.ftruncate(descriptor, size); os.fchmod(descriptor, 0o444)
            try: os.fsync(descriptor)
            except OSError: pass
            super().finish(descriptor, size)""",
    ),
    "abandon leaves it open": (
        "abandoning_closes",
        """
        def abandon(self, descriptor): pass
        def finish(self, descriptor, size): super().finish(descriptor, size); super().abandon(descriptor)""",
    ),
}

NAMES: dict[str, tuple[str, str]] = {
    "a directory is not synced": (
        "a_synced_directory_was_synced what_is_durable_outlives_a_power_cut a_synced_directory_that_is_missing",
        "def sync_directory(self, path): pass",
    ),
    "a sync of a directory fails silently": (
        "a_sync_that_fails_is_an_error_and_not_tried_again a_synced_directory_that_is_missing",
        """
        def sync_directory(self, path):
            try: super().sync_directory(path)
            except OSError: pass""",
    ),
    "directories are made over each other": (
        "make_directory",
        "def make_directory(self, path): os.makedirs(path, exist_ok=True)",
    ),
    "directories are made with their parents": ("make_directory", "def make_directory(self, path): os.makedirs(path)"),
    "link copies": (
        "link_gives_a_second_name to_another_file_system[link]",
        """
        def link(self, source, target):
            if os.path.lexists(target): raise FileExistsError(errno.EEXIST, 'there', target)
            shutil.copy(source, target)""",
    ),
    "link copies where it cannot link": (
        "to_another_file_system[link]",
        """
        def link(self, source, target):
            try: os.link(source, target)
            except OSError as e:
                if e.errno != errno.EXDEV: raise
                shutil.copy(source, target)""",
    ),
    "link replaces": (
        "link_replaces_nothing",
        """
        def link(self, source, target):
            if os.path.lexists(target): os.unlink(target)
            os.link(source, target)""",
    ),
    "link makes a symbolic one": (
        "link_gives_a_second_name",
        "def link(self, source, target): os.symlink(source, target)",
    ),
    "link forgives": (
        "link_replaces_nothing",
        """
        def link(self, source, target):
            try: os.link(source, target)
            except OSError: pass""",
    ),
    "rename moves into a directory": ("rename", "def rename(self, source, target): shutil.move(source, target)"),
    "rename copies to another file system": (
        "to_another_file_system[rename]",
        """
        def rename(self, source, target):
            try: os.rename(source, target)
            except OSError as e:
                if e.errno != errno.EXDEV: raise
                shutil.move(source, target)""",
    ),
    "rename replaces what is there": (
        "rename_does_not_replace_a_full_directory",
        """
        def rename(self, source, target):
            if os.path.isdir(target): shutil.rmtree(target)
            os.rename(source, target)""",
    ),
    "rename replaces nothing at all": (
        "rename",
        """
        def rename(self, source, target):
            if os.path.lexists(target): raise OSError(errno.ENOTEMPTY, 'there', target)
            os.rename(source, target)""",
    ),
    "rename is silent about nothing": (
        "rename",
        "def rename(self, source, target): os.path.lexists(source) and os.rename(source, target)",
    ),
    "exchange does nothing": ("exchange", "def exchange(self, one, other): pass"),
    "exchange does not say that it cannot": (
        "exchange",
        "def exchange(self, one, other): raise OSError(errno.EINVAL, 'no', other)",
    ),
    "exchange begins before it knows that it cannot": (
        "exchange",
        """
        def exchange(self, one, other):
            os.rename(other, other + '.aside'); raise OSError(errno.ENOTSUP, 'no', other)""",
    ),
    "exchange moves where there is one": (
        "exchange_with_nothing",
        """
        def exchange(self, one, other):
            if not os.path.lexists(other): os.rename(one, other); return
            super().exchange(one, other)""",
    ),
    "a missing file is removed": (
        "remove_file",
        """
        def remove_file(self, path):
            if os.path.lexists(path): os.unlink(path)""",
    ),
    "the file behind a link is removed": (
        "remove_file",
        "def remove_file(self, path): os.unlink(os.path.realpath(path))",
    ),
    "a full directory is removed": ("remove_directory", "def remove_directory(self, path): shutil.rmtree(path)"),
    "the directory behind a link is removed": (
        "remove_directory",
        "def remove_directory(self, path): os.rmdir(os.path.realpath(path))",
    ),
}

# What decorates another store; `self._store` is that one, and what is not defined here is passed on to it.
DECORATORS: dict[str, tuple[str, str]] = {
    "does not pass on the sync of directories": (
        "every_crash_leaves_the_old_or_the_new_one[beneath]",
        "def sync_directory(self, path): pass",
    ),
    "does not pass on the sync of files": (
        "every_crash_leaves_the_old_or_the_new_one[beneath]",
        """
        def finish(self, descriptor, size):
            os.ftruncate(descriptor, size); os.fchmod(descriptor, 0o444); self._store.abandon(descriptor)""",
    ),
    "clears the place before it renames": (
        "every_crash_leaves_the_old_or_the_new_one[beneath]",
        """
        def exchange(self, one, other):
            for name in os.listdir(other): self._store.remove_file(f'{other}/{name}')
            self._store.exchange(one, other)""",
    ),
    "swallows an error": (
        "an_error_of_each_call_is_told_of_once[beneath]",
        """
        def write(self, descriptor, data, offset):
            try: self._store.write(descriptor, data, offset)
            except OSError: pass""",
    ),
    "swallows that a file is not durable": (
        "an_error_of_each_call_is_told_of_once[beneath]",
        """
        def finish(self, descriptor, size):
            try: self._store.finish(descriptor, size)
            except OSError: pass""",
    ),
    "raises errors of its own": (
        "an_error_of_each_call_is_told_of_once[beneath]",
        """
        def make_directory(self, path):
            try: self._store.make_directory(path)
            except OSError as e: raise RuntimeError('failed') from e""",
    ),
    "tells of an error again": (
        "an_error_of_each_call_is_told_of_once[beneath]",
        """
        error = None
        def create(self, path, size):
            if self.error: error, self.error = self.error, None; raise error
            return self._store.create(path, size)
        def abandon(self, descriptor): self.error = OSError(errno.EIO, 'before'); self._store.abandon(descriptor)""",
    ),
}

WHOLE: dict[str, tuple[str, str]] = {
    "a bit flips in large files": (
        "what_was_saved_is_restored in_the_background_with_threads",
        """
        def write(self, descriptor, data, offset):
            data = bytearray(data)
            if len(data) > 8000: data[4000] ^= 1
            super().write(descriptor, memoryview(data), offset)""",
    ),
    "an exchange that was not made": ("a_checkpoint_is_replaced", "def exchange(self, one, other): pass"),
    "directories are not removed": ("rules_remove_checkpoints", "def remove_directory(self, path): pass"),
    "a link that was not made": ("what_is_unchanged_is_linked_or_written", "def link(self, source, target): pass"),
    "a write at a time, or none": (
        "in_the_background_with_threads",
        """
        busy = False
        def write(self, descriptor, data, offset):
            if self.busy: return
            self.busy = True; time.sleep(0.01); super().write(descriptor, data, offset); self.busy = False""",
    ),
    "files are told apart by the last of their names": (
        "two_savers_on_one_directory",
        """
        names = {}
        def create(self, path, size):
            if self.names.setdefault(os.path.basename(path), path) != path: raise FileExistsError(errno.EEXIST, path)
            time.sleep(0.005)
            return super().create(path, size)
        def abandon(self, descriptor):
            self.names.pop(os.path.basename(self._paths.get(descriptor, '')), None); super().abandon(descriptor)""",
    ),
}
