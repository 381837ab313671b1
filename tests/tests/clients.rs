//! Other people's NBD clients against `berth serve`.

use std::path::Path;

use system_tests::harness::Scratch;
use system_tests::harness::server::{Options, Server};
use system_tests::harness::tools::{fio_verify, run, run_to_fail, tool};

fn serve(name: &str, volume_mib: u64) -> (Scratch, Server) {
    let scratch = Scratch::new(name);
    let server = Server::start(&Options::new(&scratch, volume_mib));
    (scratch, server)
}

fn same(a: &Path, b: &Path) {
    run(tool("cmp").args([a, b]));
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let (_scratch, server) = serve("nbdinfo", 64);
    let uri = server.uri();
    let size: u64 = run(tool("nbdinfo").args(["--size", uri])).trim().parse().expect("a size");
    assert_eq!(size, 64 << 20);
    for ability in
        ["connect", "read", "write", "flush", "fua", "trim", "zero", "fast-zero", "df", "multi-conn", "cache"]
    {
        run(tool("nbdinfo").args(["--can", ability, uri]));
    }
    run_to_fail(tool("nbdinfo").args(["--is", "read-only", uri]));
    let missing = uri.replace(":///v", ":///no-such-volume");
    run_to_fail(tool("nbdinfo").arg(missing));
    assert!(run(tool("nbdinfo").args(["--list", uri])).contains("export=\"v\""));
    server.stop();
}

#[test]
fn nbdinfo_maps_data_and_holes() {
    let (_scratch, server) = serve("map", 64);
    let uri = server.uri();
    let map = || run(tool("nbdinfo").args(["--map", uri]));
    let lines =
        |map: &str| map.lines().map(|line| line.split_whitespace().map(str::to_owned).collect()).collect();
    let fresh: Vec<Vec<String>> = lines(&map());
    assert_eq!(fresh, [["0", "67108864", "3", "hole,zero"]], "a fresh volume is one hole");
    run(tool("qemu-io").args([
        "-f",
        "raw",
        "-c",
        "write 1M 1M",
        "-c",
        "write 8M 4k",
        "-c",
        "discard 8M 4k",
        uri,
    ]));
    let written: Vec<Vec<String>> = lines(&map());
    assert_eq!(
        written,
        [
            ["0", "1048576", "3", "hole,zero"],
            ["1048576", "1048576", "0", "data"],
            ["2097152", "65011712", "3", "hole,zero"]
        ]
    );
    server.stop();
}

#[test]
fn nbdcopy_copies_both_ways_over_four_connections() {
    let (scratch, server) = serve("nbdcopy", 128);
    let (image, copy) = (scratch.image("image", 128), scratch.file("copy"));
    let options = ["--connections=4", "--requests=64", "--flush"];
    run(tool("nbdcopy").args(options).arg(&image).arg(server.uri()));
    run(tool("nbdcopy").args(options).arg(server.uri()).arg(&copy));
    same(&image, &copy);
    server.stop();
}

#[test]
fn qemu_img_converts_compares_and_keeps_qcow2_on_a_volume() {
    let (scratch, server) = serve("qemu-img", 128);
    let (image, copy) = (scratch.image("image", 128), scratch.file("copy"));
    let uri = server.uri();
    run(tool("qemu-img")
        .args(["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw"])
        .arg(&image)
        .arg(uri));
    run(tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&image).arg(uri));
    run(tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw", uri]).arg(&copy));
    same(&image, &copy);
    run(tool("qemu-img").args(["create", "-f", "qcow2", "-o", "size=64M", uri]));
    run(tool("qemu-io").args(["-f", "qcow2", "-c", "write -P 0x5a 1M 8M", "-c", "discard 2M 1M", uri]));
    run(tool("qemu-io").args(["-f", "qcow2", "-c", "read -P 0x5a 4M 1M", "-c", "read -P 0 2M 1M", uri]));
    run(tool("qemu-img").args(["check", "-f", "qcow2", uri]));
    server.stop();
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    let (_scratch, server) = serve("qemu-io", 64);
    let commands = [
        "write -P 0xab 0 64k",
        "write -f -P 0xcd 4k 4k",
        "write -z -u 8k 4k",
        "discard 16k 4k",
        "write -P 0x11 513 1000",
        "flush",
        "read -P 0xcd 4k 4k",
        "read -P 0 8k 4k",
        "read -P 0 16k 4k",
        "read -P 0x11 513 1000",
        "read -P 0xab 1513 2583",
        "aio_write -P 1 1m 1m",
        "aio_write -P 2 2m 1m",
        "aio_flush",
        "read -P 2 2m 1m",
        "read -P 1 1m 1m",
    ];
    let mut qemu_io = tool("qemu-io");
    qemu_io.args(["-f", "raw"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    let output = run(qemu_io.arg(server.uri()));
    // A pattern that does not match is only printed, not an exit status, in some versions.
    assert!(!output.contains("verification failed"), "{output}");
    server.stop();
}

#[test]
fn fio_verifies_requests_of_512_bytes_to_256_kib() {
    let (_scratch, server) = serve("fio", 256);
    run(&mut fio_verify(server.uri(), 256));
    println!("peak memory {} KiB, CPU {:.2} s", server.peak_memory_kib(), server.cpu_seconds());
    server.stop();
}

#[test]
fn nbdkit_passes_a_volume_on() {
    let (scratch, server) = serve("proxy", 64);
    let (image, copy) = (scratch.image("image", 64), scratch.file("copy"));
    let through = |run_script: String| {
        run(tool("nbdkit")
            .args(["-U", "-", "nbd"])
            .arg(format!("uri={}", server.uri()))
            .args(["--run", &run_script]));
    };
    through(format!("nbdcopy --flush {} \"$uri\"", image.display()));
    through("nbdinfo \"$uri\"".to_owned());
    through(format!("nbdcopy \"$uri\" {}", copy.display()));
    same(&image, &copy);
    server.stop();
}
