//! The files that a report goes to.
use crate::cli::Failure;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

/// Makes sure that `path` can be written, and leaves the folder as it was: a run that fails has no report.
pub(super) fn writable(path: &Path) -> Result<(), Failure> {
    let tried = match File::create_new(path) {
        Ok(_) => std::fs::remove_file(path),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => File::options().append(true).open(path).map(drop),
        Err(e) => Err(e),
    };
    tried.map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

/// Writes all of `path` anew.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Failure> {
    std::fs::write(path, text).map_err(|e| Failure::local(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_that_could_be_written_is_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let (new, old) = (folder.path().join("new.html"), folder.path().join("old.html"));
        std::fs::write(&old, "kept").unwrap();
        writable(&new).unwrap();
        writable(&old).unwrap();
        assert!(!new.exists());
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "kept");
        for path in [folder.path().join("nowhere/new.html"), folder.path().to_owned()] {
            let message = writable(&path).unwrap_err().to_string();
            assert!(message.contains(&path.display().to_string()), "{message}");
        }
    }
}
