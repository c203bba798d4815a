//! Volumes.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use harness::cri::v1;
use harness::eventually;
use harness::kubelet::{SOON, bind};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{Mode, Outcome, Suite, skip};

fn read_only(mut mount: v1::Mount) -> v1::Mount {
    mount.readonly = true;
    mount
}

pub(super) fn host_path(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    fs::write(folder.join("file"), "host\n").unwrap();
    symlink(folder.join("file"), folder.join("link")).unwrap();
    let mut config = suite.container(
        "volumes",
        "cat /rw/file /one /two; echo guest > /rw/new; touch /ro/new2 2>/dev/null || echo refused; \
         cat /ro/new",
    );
    config.mounts = vec![
        bind(&folder, "/rw"),
        read_only(bind(&folder, "/ro")),
        bind(&folder.join("file"), "/one"),
        bind(&folder.join("link"), "/two"),
    ];
    let printed = suite.output_of(config);
    assert_eq!(printed, "host\nhost\nhost\nrefused\nguest\n");
    assert_eq!(fs::read_to_string(folder.join("new")).unwrap(), "guest\n");
    Ok(())
}

pub(super) fn two_views(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    let mut reader = suite.container(
        "reader",
        "touch /view/mine 2>/dev/null && echo written; while ! test -e /view/theirs; do sleep 1; done; \
         cat /view/theirs",
    );
    let name = reader.metadata.clone().unwrap().name;
    reader.mounts.push(read_only(bind(&folder, "/view")));
    let id = suite.pod().run_of(reader);
    let mut writer = suite.container("writer", "echo seen > /view/theirs");
    writer.mounts.push(bind(&folder, "/view"));
    suite.output_of(writer);
    let kubelet = &suite.kubelet;
    assert_eq!(kubelet.exited(&id).exit_code, 0);
    let log = kubelet.log(&name);
    assert_eq!(crate::suite::lines_of(&log, "stdout"), "seen\n");
    kubelet.remove_container(&id);
    Ok(())
}

/// A tmpfs of the host, for the time of a row.
struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn on(path: &'a Path) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = MsFlags::empty();
        mount(Some("tmpfs"), path, Some("tmpfs"), options, None::<&str>).unwrap();
        Self(path)
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = umount2(self.0, MntFlags::MNT_DETACH);
    }
}

pub(super) fn propagation(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    // On a mount of its own, shared as the node's root is.
    let top = Tmpfs::on(&folder);
    let shared = MsFlags::MS_SHARED;
    mount(None::<&str>, &folder, None::<&str>, shared, None::<&str>).unwrap();
    let mut config = suite.container(
        "follows",
        "echo up; while ! test -e /volume/late/file; do sleep 1; done; cat /volume/late/file",
    );
    let name = config.metadata.clone().unwrap().name;
    let mut volume = bind(&folder, "/volume");
    volume.set_propagation(v1::MountPropagation::PropagationHostToContainer);
    config.mounts.push(volume);
    let kubelet = &suite.kubelet;
    let id = suite.pod().run_of(config);
    kubelet.await_log(&name, "up");
    let path = folder.join("late");
    let late = Tmpfs::on(&path);
    fs::write(path.join("file"), "mounted later\n").unwrap();
    assert_eq!(kubelet.exited(&id).exit_code, 0);
    assert!(kubelet.log(&name).contains("mounted later"));
    kubelet.remove_container(&id);

    // The kubelet asks for it only of a handler that has it by containerd's account, which knows
    // runc's alone; containerd 2.1 crashes when it is asked nevertheless.
    let status = kubelet.cri.status(v1::StatusRequest::default()).unwrap();
    let mut handlers = status.runtime_handlers.into_iter();
    let ours = handlers.find(|handler| handler.name == kubelet.handler);
    let features = ours.and_then(|handler| handler.features);
    if features.is_some_and(|features| features.recursive_read_only_mounts) {
        let mut config = suite.container("rro", "touch /volume/late/x 2>/dev/null || echo refused");
        let mut volume = read_only(bind(&folder, "/volume"));
        volume.recursive_read_only = true;
        config.mounts.push(volume);
        assert_eq!(suite.output_of(config), "refused\n");
    }
    drop(late);
    drop(top);
    Ok(())
}

pub(super) fn special_files(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    let fifo = folder.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut config = suite.container(
        "fifo",
        "test -p /fifo && { echo through > /fifo & cat /fifo; }",
    );
    config.mounts.push(bind(&fifo, "/fifo"));
    assert_eq!(suite.output_of(config), "through\n");
    assert!(fs::metadata(&fifo).unwrap().file_type().is_fifo());

    let socket = folder.join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let mut config = suite.container("socket", "true");
    config.mounts.push(bind(&socket, "/socket"));
    let why = suite.pod().try_run(config).unwrap_err();
    assert!(why.message().contains("is a socket"), "{why}");
    Ok(())
}

pub(super) fn empty_dir(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    // One in memory is a tmpfs that the kubelet has mounted, with its limit.
    let memory = suite.folder();
    let options = Some("size=64k");
    mount(
        Some("tmpfs"),
        &memory,
        Some("tmpfs"),
        MsFlags::empty(),
        options,
    )
    .unwrap();
    let mut config = suite.container(
        "empty",
        "echo x > /disk/file; head -c 32768 /dev/zero > /memory/fits && echo fits; \
         head -c 65536 /dev/zero 2>/dev/null > /memory/more || echo full",
    );
    config.mounts = vec![bind(&folder, "/disk"), bind(&memory, "/memory")];
    let (ended, log) = suite.pod().finish(config);
    let _ = umount2(&memory, MntFlags::MNT_DETACH);
    assert_eq!(ended.exit_code, 0, "{log}");
    assert_eq!(crate::suite::lines_of(&log, "stdout"), "fits\nfull\n");
    Ok(())
}

/// As the kubelet writes them: files are links through `..data`, which is replaced at once.
pub(super) fn config_map(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    let version = |name: &str, text: &str| {
        fs::create_dir(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("key"), text).unwrap();
        symlink(name, folder.join("..new")).unwrap();
        fs::rename(folder.join("..new"), folder.join("..data")).unwrap();
    };
    version("..1", "old\n");
    symlink("..data/key", folder.join("key")).unwrap();
    let mut config = suite.container(
        "config",
        "cat /config/key; while ! grep -q new /config/key; do sleep 1; done; cat /config/key",
    );
    let name = config.metadata.clone().unwrap().name;
    config.mounts.push(read_only(bind(&folder, "/config")));
    let kubelet = &suite.kubelet;
    let id = suite.pod().run_of(config);
    kubelet.await_log(&name, "old");
    version("..2", "new\n");
    assert_eq!(kubelet.exited(&id).exit_code, 0);
    assert!(kubelet.log(&name).contains("new"));
    kubelet.remove_container(&id);
    Ok(())
}

/// The kubelet binds a file or folder of a volume elsewhere and names that.
pub(super) fn sub_path(suite: &Suite) -> Outcome {
    let folder = suite.folder();
    fs::create_dir(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/file"), "before\n").unwrap();
    fs::write(folder.join("outside"), "").unwrap();
    let mut config = suite.container(
        "sub",
        "cat /sub/file; ls /sub; test -e /sub/../outside && echo out; \
         while ! grep -q after /file; do sleep 1; done",
    );
    let name = config.metadata.clone().unwrap().name;
    config.mounts = vec![
        bind(&folder.join("sub"), "/sub"),
        bind(&folder.join("sub/file"), "/file"),
    ];
    let kubelet = &suite.kubelet;
    let id = suite.pod().run_of(config);
    eventually("the first lines", SOON, || {
        (kubelet.log(&name).lines().count() >= 2).then_some(())
    });
    fs::write(folder.join("sub/file"), "after\n").unwrap();
    assert_eq!(kubelet.exited(&id).exit_code, 0);
    let log = kubelet.log(&name);
    assert_eq!(crate::suite::lines_of(&log, "stdout"), "before\nfile\n");
    kubelet.remove_container(&id);
    Ok(())
}

pub(super) fn image_volume(suite: &Suite) -> Outcome {
    if suite.mode == Some(Mode::Shim17) {
        return skip("containerd 1.7 has no image volumes");
    }
    let mut config = suite.container(
        "image",
        "test -x /volume/bin/sh && echo there; touch /volume/x 2>/dev/null || echo refused",
    );
    let image = v1::ImageSpec {
        image: suite.kubelet.image.clone(),
        ..Default::default()
    };
    config.mounts.push(v1::Mount {
        container_path: "/volume".to_owned(),
        readonly: true,
        image: Some(image),
        ..Default::default()
    });
    assert_eq!(suite.output_of(config), "there\nrefused\n");
    Ok(())
}
