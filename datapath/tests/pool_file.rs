//! Pool files on a real filesystem.

use std::path::PathBuf;

use datapath::reactor::pool_file::{PoolFile, PoolFileError};

fn scratch(name: &str) -> PathBuf {
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("pool-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a scratch directory");
    let path = directory.join(name);
    if path.exists() {
        std::fs::remove_file(&path).expect("an old file goes");
    }
    path
}

#[test]
fn a_new_pool_is_allocated_and_found_again() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let path = scratch("new");
    let pool = PoolFile::create(&path, 8 << 20).expect("a pool");
    assert_eq!(pool.length_bytes(), 8 << 20);
    let metadata = std::fs::metadata(&path).expect("there");
    assert!(metadata.blocks() * 512 >= 8 << 20, "space is promised, not only named");
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    drop(pool);
    assert_eq!(PoolFile::open(&path).expect("still there").length_bytes(), 8 << 20);
    assert!(matches!(PoolFile::create(&path, 4096), Err(PoolFileError::Exists { .. })));
}

#[test]
fn any_memory_serves_to_read_and_write_whole_blocks() {
    let path = scratch("bytes");
    let pool = PoolFile::create(&path, 8 << 20).expect("a pool");
    // Longer than the bounce buffer, and at an odd address.
    let data: Vec<u8> = (0..(2 << 20) + 4096 + 1).map(|index: u32| index.to_le_bytes()[0] ^ 0x5a).collect();
    pool.write_at(4096, &data[1..]).expect("written");
    pool.sync().expect("synced");
    let mut back = vec![0; data.len()];
    pool.read_at(4096, &mut back[1..]).expect("read");
    assert!(back[1..] == data[1..]);
    let mut past_the_end = vec![0; 8192];
    let error = pool.read_at((8 << 20) - 4096, &mut past_the_end).expect_err("half of it is not there");
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_second_opener_is_refused_by_name() {
    let path = scratch("locked");
    let pool = PoolFile::create(&path, 1 << 20).expect("a pool");
    let file = pool.file();
    drop(pool);
    let error = PoolFile::open(&path).expect_err("the reactor still has the file");
    assert!(matches!(error, PoolFileError::InUse { .. }));
    assert!(error.to_string().contains("locked: the pool is in use by another process"), "{error}");
    drop(file);
    PoolFile::open(&path).expect("free again");
}

#[test]
fn a_pool_grows_and_never_shrinks() {
    let path = scratch("grown");
    let mut pool = PoolFile::create(&path, 1 << 20).expect("a pool");
    pool.grow(3 << 20).expect("space");
    assert_eq!(pool.length_bytes(), 3 << 20);
    assert!(matches!(pool.grow(1 << 20), Err(PoolFileError::CannotGrow { .. })));
    assert!(matches!(pool.grow(1 << 60), Err(PoolFileError::Allocate { .. })));
    drop(pool);
    assert_eq!(PoolFile::open(&path).expect("as before").length_bytes(), 3 << 20);
}

#[test]
fn what_does_not_fit_leaves_nothing_behind() {
    let path = scratch("too-large");
    assert!(matches!(PoolFile::create(&path, 1 << 60), Err(PoolFileError::Allocate { .. })));
    assert!(!path.exists());
}

#[test]
fn only_storage_is_opened() {
    for path in ["/dev", "/dev/null"] {
        assert!(matches!(PoolFile::open(path.as_ref()), Err(PoolFileError::NotStorage { .. })), "{path}");
    }
    let missing = PoolFile::open(&scratch("missing")).expect_err("no such file");
    assert!(missing.to_string().contains("missing: cannot open the pool"), "{missing}");
}
