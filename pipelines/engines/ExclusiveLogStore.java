package adasid;

import io.delta.storage.HadoopFileSystemLogStore;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.FileAlreadyExistsException;
import java.nio.file.Files;
import java.nio.file.StandardCopyOption;
import java.util.Arrays;
import java.util.Iterator;
import java.util.UUID;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FSDataOutputStreamBuilder;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;

/**
 * Delta's log store for s3a and local files, whose commits exclude each other and those of delta-rs: by a conditional
 * PUT (If-None-Match) and by a hard link. Delta's defaults check first and write then, which loses one of two commits.
 */
public final class ExclusiveLogStore extends HadoopFileSystemLogStore {
    public ExclusiveLogStore(Configuration conf) {
        super(conf);
    }

    public void write(Path path, Iterator actions, Boolean overwrite, Configuration conf) throws IOException {
        ByteArrayOutputStream lines = new ByteArrayOutputStream();
        while (actions.hasNext()) {
            lines.write((actions.next() + "\n").getBytes("UTF-8"));
        }
        byte[] content = lines.toByteArray();
        FileSystem store = path.getFileSystem(conf);
        if ("file".equals(store.getUri().getScheme())) {
            link(Path.getPathWithoutSchemeAndAuthority(path), content, overwrite.booleanValue());
        } else {
            put(store, path, content, overwrite.booleanValue());
        }
    }

    public Boolean isPartialWriteVisible(Path path, Configuration conf) {
        return Boolean.FALSE;
    }

    private static void link(Path path, byte[] content, boolean overwrite) throws IOException {
        java.nio.file.Path target = new java.io.File(path.toString()).toPath();
        Files.createDirectories(target.getParent());
        java.nio.file.Path draft = target.resolveSibling("." + target.getFileName() + "." + UUID.randomUUID() + ".tmp");
        try {
            Files.write(draft, content);
            if (overwrite) {
                Files.deleteIfExists(target.resolveSibling("." + target.getFileName() + ".crc"));
                Files.move(draft, target, StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING);
            } else {
                Files.createLink(target, draft);
            }
        } finally {
            Files.deleteIfExists(draft);
        }
    }

    private static void put(FileSystem store, Path path, byte[] content, boolean overwrite) throws IOException {
        FSDataOutputStreamBuilder builder = store.createFile(path);
        builder.overwrite(overwrite);
        if (!overwrite) {
            builder.must("fs.option.create.conditional.overwrite", true);
        }
        try {
            FSDataOutputStream file = (FSDataOutputStream) builder.build();
            file.write(content);
            file.close();
        } catch (IOException error) {
            String text = error.toString();
            boolean exists = error instanceof org.apache.hadoop.fs.FileAlreadyExistsException
                || text.contains("Status Code: 412") || text.contains("Status Code: 409");
            if (overwrite || !exists) {
                throw error;
            }
            boolean mine;
            try {
                mine = mine(store, path, content);
            } catch (java.io.FileNotFoundException absent) {  // the other PUT is not finished
                throw error;
            }
            if (!mine) {
                throw new FileAlreadyExistsException(path.toString());
            }
        }
    }

    /** A PUT whose answer was lost is repeated by the client and refused: the commit in the store is then this one. */
    private static boolean mine(FileSystem store, Path path, byte[] content) throws IOException {
        byte[] there = new byte[content.length + 1];
        int length = 0;
        InputStream file = store.open(path);
        try {
            int read = 0;
            while (read >= 0 && length < there.length) {
                read = file.read(there, length, there.length - length);
                length += Math.max(read, 0);
            }
        } finally {
            file.close();
        }
        return length == content.length && Arrays.equals(content, Arrays.copyOf(there, length));
    }
}
